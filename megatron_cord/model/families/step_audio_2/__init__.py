"""Step-Audio 2: names and architecture, its audio modules, a plain model, and the class that SGLang loads."""
