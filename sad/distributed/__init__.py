"""One run on several processes: who they are, how models are split, what each of them saves.

A process of its own does without all of this.
"""
