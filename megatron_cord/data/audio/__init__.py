"""Audio as arrays: decoding, resampling, augmentation, and log-mel features."""
