"""The program: one process that serves a model, or several behind one port, made of the settings."""
