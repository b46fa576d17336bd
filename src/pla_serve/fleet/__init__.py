"""Many instances behind one API: links, router, KV transfer, supervision, control."""
