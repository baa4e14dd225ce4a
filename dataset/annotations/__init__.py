"""Annotations of others: read, checked and drawn as masks, and masks written as annotations."""
