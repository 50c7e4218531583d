"""Models of how the blocks of a recurrent layer pass h on, small enough to try every order."""
