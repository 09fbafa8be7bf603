"""hwnas: the most accurate image network that runs within a time budget on the device you name."""
