"""The HTTP surface: routes, schemas, guards, and how answers are written."""
