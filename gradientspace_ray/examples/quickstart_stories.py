"""Words and sentences of the built-in mixture's story openings."""

PLACE_PROMPTS = (
    "Write the opening of a story about {figure} in {place}.",
    "Begin a tale set in {place}. Its hero is {figure}.",
    "Tell me the first lines of a story set in {place}.",
    "Give me a story opening with {figure} and {place}.",
    "Imagine {place} long ago. Who is there? Begin the story.",
    "Start a legend about {place}.",
    "Begin a story: {place}, and {figure}.",
)
FIGURE_PROMPTS = (
    "How might a fairy tale about {figure} start?",
    "Start a bedtime story about {figure}.",
    "Write two sentences that open a tale about {figure}.",
    "Begin a story about {figure} for my children.",
    "Open a mysterious story about {figure}.",
)
FIGURES = (
    *("a lighthouse keeper", "a young weaver", "an old fox", "a clockmaker", "a ferryman", "a silent king"),
    *("a girl with a lantern", "a retired pirate", "a beekeeper", "a stray dog", "a mapmaker", "a shepherd boy"),
    *("a forgetful wizard", "a blind painter", "a baker's daughter", "a lost soldier", "a small dragon"),
)
PLACES = (
    *("the village under the ice", "the harbour of Lorn", "the silent forest", "the city of bridges"),
    *("the mill by the river", "the last house on the moor", "the valley of bells", "the tower without doors"),
    *("the castle with one window", "the attic of the bakery", "the blue desert", "the walled garden"),
    *("the salt mountains", "the old theatre"),
)
WEATHERS = (
    *("snow fell without a sound", "a warm wind came from the sea", "fog hung in the lanes", "thunder rolled far away"),
    *("frost silvered the roofs", "rain drummed on the windows", "the moon was thin as a nail"),
    *("the stars seemed close enough to pick",),
)
PLACE_OPENINGS = (
    "in {place} there once lived {figure}.",
    "nobody knew when {figure} had come to {place}.",
    "there are three ways into {place}, and {figure} knew the fourth.",
    "{figure} kept a secret in {place}.",
    "this is the tale of {figure} and the secret of {place}.",
    "in {place} they still speak of {figure}.",
    "long before there were roads, {figure} came to {place}.",
    "they say that {place} belongs to {figure}.",
    "once in a hundred years {figure} returned to {place}.",
    '"Never go to {place}," they said; but {figure} went.',
)
WEATHER_OPENINGS = (
    "{weather}, and only {figure} was awake.",
    "on the night that {figure} was born, {weather}.",
    "{weather} on the night that {figure} vanished.",
    "{weather}, but {figure} could not sleep.",
    "{weather} when {figure} lit the last candle.",
)
HAPPENINGS = (
    "One morning a letter lay on the step, addressed to no one.",
    "Then a bell, silent for a hundred years, rang twice.",
    "For weeks small things had been vanishing: a spoon, a shadow.",
    "A stranger brought a cage, and in the cage something was singing.",
    "Under the floor, quite clearly, someone knocked.",
    "That day the river forgot which way to run.",
    "A key turned by itself, as if it were afraid.",
    "Out of the dark came a child with wet hair.",
    "That autumn the swallows did not leave.",
    "Outside stood a horse, white as salt, with a crown.",
    "A voice, no louder than a moth, asked for milk.",
    "In the bread lay a ring, engraved with tomorrow's date.",
    "With a candle and too little courage, the journey began.",
    "No one laughed this time.",
    "By dawn nothing was as it had been.",
    "Only the cat seemed to have expected it.",
    "What happened next is still told in whispers.",
    '"At last," said the dark, "I thought you would never come."',
    "Far away, something very old opened one eye.",
    "There was hardly time to be afraid.",
    "The footprints led in one direction only.",
    "The door, which had always been locked, stood open.",
    "From that hour the clocks ran backwards.",
    "The music came from below, where there was no cellar.",
)
