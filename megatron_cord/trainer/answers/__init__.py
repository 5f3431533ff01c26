"""Responses that are not the student's: the teacher's reference answers, ahead of training or in time; given ones."""
