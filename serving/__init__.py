"""Replies, and the policy that gives them. May import feedback."""
