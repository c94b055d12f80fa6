"""Scoring of tasks with options or short answers."""

from .scoring import TaskScore, score_tasks


__all__ = ["TaskScore", "score_tasks"]
