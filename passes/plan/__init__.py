"""Surveys: passes that change no weight and decide options of later ones."""
