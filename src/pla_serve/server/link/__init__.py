"""The instance's side of its links to routers."""
