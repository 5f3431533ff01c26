"""How answers are written: notation, number words and units, without any meaning of the answer as a whole."""
