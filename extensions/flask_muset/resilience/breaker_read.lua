-- The states of breakers, false for one of which nothing is known.
-- KEYS: of the breakers.
local states = {}
for index, key in ipairs(KEYS) do
  local stored = read(key)
  states[index] = stored and told(stored) or false
end
return states
