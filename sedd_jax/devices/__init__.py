"""What runs on: mesh, processes, stop signals, and what chips can do."""
