"""Training rows from files: readers of JSON lines, folders, archives and tables, columns, images, and checks."""
