"""The model `megatron_cord` of lmms-eval: its tasks on a trained checkpoint, or on the servers of a configuration."""
