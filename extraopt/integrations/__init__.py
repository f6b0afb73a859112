"""ExtraAdam in trainers: one file for each framework, imported only by who uses it."""
