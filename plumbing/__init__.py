"""What training stands on: files and checkpoints, downloads, the command line, CUDA graphs, processes."""
