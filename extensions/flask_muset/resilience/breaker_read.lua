-- The states of breakers, false for one of which nothing is known, {} for what is none.
-- KEYS: of the breakers.
local function state(key)
  local stored = read(key)
  return stored and told(stored) or false
end

local states = {}
for index, key in ipairs(KEYS) do
  local is_read, found = pcall(state, key)
  states[index] = is_read and found or (not is_read and {})
end
return states
