"""What the method stands on and does not care about: files, downloads, the command line, CUDA graphs, processes."""
