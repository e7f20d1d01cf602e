"""The OpenAI API's shapes: requests as strict pydantic models, answers as msgspec structs."""
