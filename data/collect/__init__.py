"""Fetching a manifest of addresses politely, into a folder that a recipe can name as its audio. Imports no torch."""
