"""From text to tokens and back, a token at a time: what proxy and Python API share. Imports no torch."""
