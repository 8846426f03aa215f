"""The OpenAI front and everything that decides."""
