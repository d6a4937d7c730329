"""unsink: does an unlearned language model forget, or does it only pretend to until somebody says the word?"""

__version__ = "0.1.0"
