"""Scoring of tasks: with options, with short answers, and by what a model generates."""

from .intervals import Interval, bootstrap_interval
from .scoring import TaskScore, score_tasks


__all__ = ["Interval", "TaskScore", "bootstrap_interval", "score_tasks"]
