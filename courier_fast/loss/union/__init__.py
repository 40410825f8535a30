"""Candidates in more than one place: other processes and a memory."""
