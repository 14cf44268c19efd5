"""The kill test: a run that is killed again and again ends as one that never was.

python -m tests.chaos --kills=30 --seed=0
"""
