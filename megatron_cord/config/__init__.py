"""YAML and overrides into the dataclasses of the components."""
