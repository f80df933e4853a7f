"""Answers to many questions at once, token by token, in a memory of their own."""
