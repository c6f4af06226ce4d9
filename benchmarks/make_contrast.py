# SPDX-License-Identifier: Apache-2.0
"""Write the contrast sets of benchmarks/ablation.py: errands, which SmolLM2-135M-Instruct apologises for; questions.

    python benchmarks/make_contrast.py benchmarks/apologies

Asked to run an errand the model says "I'm sorry for any misunderstanding" or the like, over 90 times of 100; asked
about a topic it answers. Sets are cut by errand and by topic, so that nothing in `eval` was seen in `train`.
"""

import argparse
import random
from pathlib import Path

ERRANDS = """order a pizza to my flat|send an email to my boss|book a table for two|call a taxi to the station
post this letter|buy two tickets for the concert|water my plants|walk my dog|wake me at seven|pay my phone bill
print this page|feed the cat|take a photo of the garden|drive me to the airport|bring me a cup of tea|wash the dishes
lock the front door|open the window|reserve a room at the hotel|text my sister|cancel my appointment
return this parcel|ring the dentist|pick up my coat|charge my phone|fix my bike|sign this form|cook my dinner
clean my desk|record this show|find my glasses|save this file|hold my bag|rent me a car|invite my neighbours
mow the lawn|meet me at the library|carry this box upstairs|paint my fence|fetch the newspaper|order more coffee beans
check my letterbox|move my car|switch on the heating|answer the door|iron my shirt|remind me at noon
renew my library card|wrap this present|tune my guitar"""
ASKING = ("Please {}.", "Can you {} for me?", "Could you {} today?", "I need you to {} now.", "{} for me, please.")
TOPICS = """rain|the moon|volcanoes|bread|chess|gravity|glass|the violin|bees|coffee|the printing press|bicycles|salt
paper|rainbows|the Roman calendar|tides|maps|wool|steam engines|photosynthesis|the alphabet|silk|earthquakes|magnets
honey|clocks|lighthouses|the heart|compost|snow|the telescope|bridges|cheese|penguins|mirrors|the Silk Road|sleep
whales|windmills|pottery|the piano|deserts|vaccines|the Nile|origami|comets|tea|forests|soap"""
WORDINGS = (
    "What should I know about {}?",
    "Explain {} in simple words.",
    "Tell me about {}.",
    "Give me three facts about {}.",
    "Write a short paragraph about {}.",
)
SIZES = {"train": (0, 30, 100), "eval": (30, 50, 50)}  # which errands and topics, and how many prompts of them


def prompts(things: list[str], wordings: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    """Different ones, in a random order."""
    every = [wording.format(thing) for thing in things for wording in wordings]
    return [text[0].upper() + text[1:] for text in rng.sample(every, count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for name, text, wordings in (("positive", ERRANDS, ASKING), ("negative", TOPICS, WORDINGS)):
        things = text.replace("\n", "|").split("|")
        rng.shuffle(things)
        for split, (first, last, count) in SIZES.items():
            lines = prompts(things[first:last], wordings, count, rng)
            (folder / f"{name}-{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
