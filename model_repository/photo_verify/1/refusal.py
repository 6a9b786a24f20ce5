"""The words by which the served photo models say that the photo or the request is at fault, and not the server.

The words are all there is to go by: Triton hands a model that calls another its message, but not its status.
"""

PHOTO_REFUSED = "photo refused: "  # a message begins so; the reason follows
NUMBER_EXPECTED = ": expected a number in "  # between a parameter with its value and the range
