"""Users' files as they are: tables, ids, times and words for yes and no."""
