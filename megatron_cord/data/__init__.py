"""What training reads: samples, views, prompts, features, shards, and the loader."""
