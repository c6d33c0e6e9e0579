"""Checks of a problem: the laws that every solver relies on."""
