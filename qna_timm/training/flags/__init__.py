"""The settings of a run: its flags, recipes, and the checks of both."""
