"""A recipe of one's own, compared with CLIP: one random half and a bag of words.

    python docs/examples/own_recipe.py pairs.csv comparisons/words-half
"""

import sys
from dataclasses import replace

import aclip

flip = aclip.RECIPES["flip"]
words = aclip.ObjectiveConfig(reads=("masked", "captions"))
aclip.RECIPES["words-half"] = replace(flip, name="words-half", title="a random half, and a bag of its words",
                                      objectives={**flip.objectives, "bag_of_words": words})

if __name__ == "__main__":  # compare starts a process for each run, which imports this file again
    aclip.compare(recipes=("clip", "words-half"), model="vit-micro", data=sys.argv[1], validation=sys.argv[1],
                  output=sys.argv[2], epochs=1, seeds=(0,))
