"""Messages between processes: server and engine (`engine`), router and instance (`link`).

The structs are grouped by subject: `requests`, `answers`, `transfer`, `statistics`, `lifecycle`.
`engine` and `link` list what travels which way, `limits` bounds every field, and `codec` and
`frames` turn messages into bytes. Server, engine and fleet import this package; it imports none of
them.
"""
