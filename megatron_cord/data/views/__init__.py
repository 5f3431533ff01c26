"""Views: the chats that are made of a sample's parts for student and teacher."""

from megatron_cord.data.views.entries import Filter
from megatron_cord.data.views.views import PlainView, View, ViewConfig, Views, check_student, filtered

__all__ = ["Filter", "PlainView", "View", "ViewConfig", "Views", "check_student", "filtered"]
