"""The text of files that strangers have made, read in a process of its own."""
