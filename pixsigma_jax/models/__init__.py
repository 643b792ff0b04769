"""The networks: arrays in, arrays out; no noise, no mesh, no config files.

Axis letters, the same in annotations, einsums and einops across the package:
  b batch   n image tokens   m compressed tokens   t caption tokens   h, w token grid
  d width   k heads   f head features   c channels   e caption embedding width
"""
