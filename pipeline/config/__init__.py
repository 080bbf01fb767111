"""Recipes: the settings of a run and their strict loading."""
