-- What several scripts of the journal need; it stands before each of them.
-- ARGV: place, and what the script says.
local place = ARGV[1]
local DUE, AGE, BOUND = place .. 'due', place .. 'age', place .. 'bound'
local HOMES, COUNTS, DEAD = place .. 'homes', place .. 'n', place .. 'dead'
-- Of one claim or page, so that it can be sent within a budget.
local MOST_RECORDS, MOST_BYTES = 100, 1048576

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function stream(key) return place .. 's:' .. key end
local function facts(key) return place .. 'k:' .. key end

-- A Redis that is out of memory lets a script write that has begun with what takes none: else what
-- waits could never be claimed, and the memory never become free.
local function begin() redis.call('HDEL', COUNTS, '-') end

local function named(list)
  local found = {}
  for index = 1, #list, 2 do found[list[index]] = list[index + 1] end
  return found
end

-- What is known of a key. What is no hash is not of the journal's making, and stands in its way.
local function known(key)
  local list = redis.pcall('HGETALL', facts(key))
  if list.err then
    redis.call('UNLINK', facts(key))
    return {}
  end
  return named(list)
end

local function is_held(state, now) return state.token and (tonumber(state.ends) or 0) > now end

-- The record of a stream's entry; nil if it cannot be one.
local function record_of(entry)
  local record, digits = named(entry[2]), string.match(entry[1], '^(%d+)%-0$')
  if not (digits and #digits <= 16 and tonumber(digits) < 2 ^ 53) then return nil end
  record.seq = digits
  return record.w and record.d and record
end

local function add(key, record)
  local seq = record.seq
  return redis.pcall('XADD', stream(key), seq .. '-0', 'w', record.w, 'c', record.c or '0', 'h',
    record.h or '', 'a', record.a or seq, 'd', record.d)
end

-- Keep something that is no record among the dead letters: it has no data.
local function set_aside(key, id, why, now)
  redis.call('XADD', DEAD, '*', 'k', key, 'q', string.match(id, '^%d+') or '0', 'n', '0', 'f', now,
    'l', now, 'e', 'this cannot be read: ' .. string.sub(why, 1, 900))
  redis.call('HINCRBY', facts(key), 'dead', 1)
end

-- Build the stream of a key anew: without what cannot be read, and with a record at its old place.
local function rebuild(key, now, letter)
  local entries = redis.pcall('XRANGE', stream(key), '-', '+')
  redis.call('UNLINK', stream(key))
  known(key)
  if entries.err then
    set_aside(key, '0', entries.err, now)
    entries = {}
  end
  for _, entry in ipairs(entries) do
    local record = record_of(entry)
    if letter and record and tonumber(letter.seq) < tonumber(record.seq) then
      add(key, letter)
      letter = nil
    end
    if not record or type(add(key, record)) == 'table' then
      set_aside(key, entry[1], table.concat(entry[2], ' '), now)
    end
  end
  if letter then add(key, letter) end
end

-- The oldest records of a key, and whether these are all; nil if one cannot be read.
local function oldest(key)
  local records, size, from, step = {}, 0, '-', 1
  while #records < MOST_RECORDS and size < MOST_BYTES do
    local page = redis.pcall('XRANGE', stream(key), from, '+', 'COUNT', step)
    if page.err then return nil end
    for _, entry in ipairs(page) do
      local record = record_of(entry)
      if not record then return nil end
      records[#records + 1] = record
      size = size + #record.d
    end
    if #page < step then break end
    from, step = '(' .. page[step][1], math.min(2 * step, MOST_RECORDS - #records)
  end
  return records, #records == redis.call('XLEN', stream(key)), size
end

-- Claim a key that is free; the claim as it is told, how many records it has, and their bytes. The
-- caller lets it be due when the claim ends.
local function take(key, token, now, ends)
  local records, is_whole, size = oldest(key)
  if not records then
    rebuild(key, now)
    records, is_whole, size = oldest(key)
  end
  local state, ids, told = known(key), {}, {}
  for index, record in ipairs(records) do
    local seq = record.seq
    ids[index] = ' ' .. seq .. ':' .. #record.d
    told[index] = {
      seq, record.w, record.c or '0', record.h or '', record.d, state['f' .. seq] or ''
    }
  end
  redis.call('HSET', facts(key), 'token', token, 'ends', ends, 'ids', table.concat(ids))
  if records[1] then redis.call('ZADD', AGE, tonumber(records[1].a) or records[1].seq, key) end
  return {key, token, is_whole and 1 or 0, told}, #records, size
end

local function count(records, bytes)
  redis.call('HINCRBY', COUNTS, 'pending', records)
  redis.call('HINCRBY', COUNTS, 'bytes', bytes)
end

-- Let a key that has no record be as if it had never been; only its dead letters are remembered.
local function clear(key, now)
  local state = known(key)
  redis.call('UNLINK', stream(key))
  redis.call('ZREM', AGE, key)
  redis.call('HDEL', BOUND, key)
  if is_held(state, now) then return end
  redis.call('ZREM', DUE, key)
  if state.dead then
    for name in pairs(state) do
      if name ~= 'dead' and string.sub(name, 1, 1) ~= 'x' then
        redis.call('HDEL', facts(key), name)
      end
    end
  else
    redis.call('UNLINK', facts(key))
  end
end

-- Note what is now the oldest record of a key; whether there is one.
local function tidy(key, now)
  local first = redis.call('XRANGE', stream(key), '-', '+', 'COUNT', 1)[1]
  if not first then
    clear(key, now)
    -- Records that others have put in were never counted: here the count is right again.
    if redis.call('EXISTS', DUE) == 0 then redis.call('HDEL', COUNTS, 'pending', 'bytes') end
    return false
  end
  local record = named(first[2])
  redis.call('ZADD', AGE, tonumber(record.a) or string.match(first[1], '^%d+'), key)
  if (record.h or '') == '' then
    redis.call('HDEL', BOUND, key)
  else
    redis.call('HSET', BOUND, key, record.h)
  end
  return true
end

-- One dead letter of a key less.
local function forget_letter(key)
  if redis.call('HINCRBY', facts(key), 'dead', -1) <= 0 then
    redis.call('HDEL', facts(key), 'dead')
  end
end

