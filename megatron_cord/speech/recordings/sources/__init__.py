"""Where rows with recordings come from, each kind read by the library that defines it."""
