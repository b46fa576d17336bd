"""Many instances behind one API: who gets a request, and what happens when an instance fails."""
