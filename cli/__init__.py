"""The command line: one small file per command, which parses, calls one library function and renders."""
