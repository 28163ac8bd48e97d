"""What the kernel knows of the network here: its routing rules and tables, and which device plays which role."""
