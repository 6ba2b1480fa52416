"""The processes of a run: what connects them, and how they are started again."""
