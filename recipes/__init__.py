"""The recipes that ship with upcycle, one TOML file each."""
