"""One file per method; a file in this folder is a method that users can name."""
