"""Words and sentences of the built-in mixture's story openings."""

STORY_PROMPTS = (
    "Write the opening of a story about {figure} in {place}.",
    "Begin a tale that takes place in {place}. Its hero is {figure}.",
    "How might a fairy tale about {figure} start?",
    "Tell me the first lines of a story set in {place}.",
    "Give me a story opening with {figure} and {place}.",
    "Once upon a time there was {figure}. Continue.",
    "I want to read to my children tonight. Start a story about {figure} who lives in {place}.",
    "Write a short, atmospheric beginning: {place}, and {figure} who cannot sleep.",
    "Imagine {place} long ago. Who lives there? Begin the story.",
    "Open a bedtime story in which {figure} finds something strange.",
    "Start a legend that old people tell in {place}.",
    "Narrate how {figure} came to {place}.",
)
FIGURES = (
    *("a lighthouse keeper", "a young weaver", "an old fox", "a clockmaker's daughter", "a ferryman", "a silent king"),
    *("a girl with a lantern", "a retired pirate", "a beekeeper", "the youngest of seven brothers", "a stray dog"),
    *("a mapmaker", "a widow with a red door", "a shepherd boy", "a travelling puppeteer", "a forgetful wizard"),
)
PLACES = (
    *("a village under the ice", "the harbour of Lorn", "a forest without birds", "a city of bridges"),
    *("a mill by the black river", "the last house before the moor", "an island that moves", "a valley of bells"),
    *("a castle with one window", "the attic of a bakery", "a desert of blue sand", "a train that never stops"),
    *("a garden behind a wall", "the salt mountains"),
)
WEATHERS = (
    *("the snow fell without a sound", "a warm wind came from the sea", "fog hung in the lanes", "thunder walked away"),
    *("the first frost silvered the roofs", "rain drummed on every window", "the moon was thin as a nail"),
    *("the sun stayed low and red", "the stars seemed close enough to pick", "dust danced in the evening light"),
)
OPENINGS = (
    "in {place}, where {weather}, there once lived {figure}.",
    "nobody remembered when {figure} had come to {place}.",
    "on the night it began, {weather}, and {figure} was the only one awake.",
    '"Never open it after dark," they said in {place}; but {figure} had never been good at listening.',
    "long before the roads were built, {figure} kept a secret in {place}.",
    "there are three ways into {place}, and {figure} knew the fourth.",
    "{weather}. In {place} every door was shut but one, and behind it sat {figure}.",
    "if you had asked anyone in {place}, they would have told you that {figure} was born lucky.",
    "every evening, when {weather}, {figure} walked once around {place} and counted the lights.",
    "this is the story of {figure}, and of what was buried in {place}.",
)
HAPPENINGS = (
    "One morning a letter lay on the step, sealed with green wax and addressed to no one.",
    "Then the bell that had been silent for a hundred years rang twice.",
    "For weeks small things had been vanishing: a spoon, a shadow, the name of a street.",
    "A stranger came with a cage under his coat, and in the cage something was singing.",
    "Under the floor, quite clearly, someone knocked.",
    "It was the day when the river forgot which way to run, and {weather}.",
    "The key turned by itself, slowly, as if it were afraid of the sound.",
    "Out of the dark came a child with wet hair, who would not say where she was from.",
    "That autumn the swallows did not leave, and the old women began to whisper.",
    "What stood in the yard was a horse, white as salt, with a crown hung on its saddle.",
    "A voice, no louder than a moth, asked for a cup of milk and a place by the fire.",
    "In the bread they found a gold ring, and engraved in it was tomorrow's date.",
)
ENDINGS = (
    "And so, with a candle and too little courage, the journey began.",
    "No one laughed this time.",
    "By dawn nothing was as it had been.",
    "Only the cat seemed to have expected it.",
    "It would have been wiser to turn back.",
    "What happened next is still told in whispers.",
    '"At last," said the dark, "I thought you would never come."',
    "Far away, something very old opened one eye.",
    "There was no time to pack; there was hardly time to be afraid.",
    "The footprints led in one direction only.",
    "And the door, which had always been locked, stood open.",
    "From that hour the clocks ran backwards.",
)
