"""Other projects' protocols onto the same pipeline, queue and limits; each is a module, imported only with its flag."""
